"use strict";
/* Makes the curves of the page readable by pointer and keyboard. Scripts that change the page do so through `report`. */
const report = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const shown = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(3);
    return String(Number(value.toPrecision(size >= 1e4 ? 6 : 4)));
  };

  /* Exponential moving average; the weights of the values so far add up to 1, so that it starts at the first value. */
  const smoothed = (points, keep) => {
    let mean = 0, weight = 0;
    return points.map(([step, value]) => {
      mean = keep * mean + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return [step, mean / weight];
    });
  };

  class Curve {
    constructor(figure) {
      this.figure = figure;
      this.svg = figure.querySelector(":scope > svg");
      this.reader = figure.querySelector(".reader");
      this.readout = figure.querySelector(".readout");
      this.load();
      this.reader.addEventListener("input", () => this.show(Number(this.reader.value)));
      this.reader.addEventListener("focus", () => this.show(Number(this.reader.value)));
      this.reader.addEventListener("blur", () => this.clear());
      for (const event of ["pointermove", "pointerdown"]) {
        this.svg.addEventListener(event, (at) => this.show(this.nearest(at)));
      }
      this.svg.addEventListener("pointerleave", () => this.clear());
    }

    /* Take up what the figure has: at first, and after a change. A step that is being read stays. */
    load() {
      const read = this.marks && this.steps[Number(this.reader.value)];
      this.clear();
      Object.assign(this, JSON.parse(this.figure.querySelector("script").textContent));
      this.values = this.lines.map((line) => new Map(line.points));
      this.steps = [...new Set(this.lines.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
      this.name();
      this.reader.max = this.steps.length - 1;
      this.reader.value = this.steps.length - 1;
      this.reader.hidden = this.steps.length < 2;
      this.reader.setAttribute("aria-valuetext", this.said(this.steps.at(-1)));
      this.smooth(kept());
      if (read !== undefined) this.show(this.closest(read));
    }

    /* The title would open as a tooltip over the values: it becomes a label, which says the same without one. */
    name() {
      const title = this.svg.querySelector("title");
      this.svg.setAttribute("aria-label", title.textContent);
      this.svg.removeAttribute("aria-labelledby");
      title.remove();
    }

    x(step) {
      const [left, right] = this.plot;
      return left + ((step - this.xSpan[0]) / (this.xSpan[1] - this.xSpan[0])) * (right - left);
    }

    y(value) {
      const [, , top, bottom] = this.plot;
      return bottom - ((value - this.ySpan[0]) / (this.ySpan[1] - this.ySpan[0])) * (bottom - top);
    }

    nearest(at) {
      const box = this.svg.getBoundingClientRect();
      const x = ((at.clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
      const [left, right] = this.plot;
      return this.closest(this.xSpan[0] + ((x - left) / (right - left)) * (this.xSpan[1] - this.xSpan[0]));
    }

    /* The index of the step that is closest to a number. */
    closest(number) {
      let best = 0;
      this.steps.forEach((step, index) => {
        if (Math.abs(step - number) < Math.abs(this.steps[best] - number)) best = index;
      });
      return best;
    }

    said(step) {
      const parts = this.lines.flatMap((line, index) => {
        if (!this.values[index].has(step)) return [];
        const value = shown(this.values[index].get(step));
        return [this.lines.length > 1 ? `${line.label} ${value}` : value];
      });
      return `${this.unit} ${step}: ${parts.join(", ")}`;
    }

    show(index) {
      const step = this.steps[index];
      this.clear();
      this.reader.value = index;
      this.reader.setAttribute("aria-valuetext", this.said(step));
      this.readout.textContent = this.said(step);
      const [, , top, bottom] = this.plot;
      this.marks = make("g", {});
      this.marks.append(make("path", { class: "cursor", d: `M${this.x(step)} ${top}V${bottom}` }));
      this.lines.forEach((line, at) => {
        if (!this.values[at].has(step)) return;
        const spot = { class: `spot s${line.style}`, cx: this.x(step), cy: this.y(this.values[at].get(step)), r: 3.5 };
        this.marks.append(make("circle", spot));
      });
      this.svg.append(this.marks);
    }

    clear() {
      this.marks?.remove();
      this.marks = undefined;
      this.readout.textContent = "";
    }

    smooth(keep) {
      for (const path of this.svg.querySelectorAll(".smoothed")) path.remove();
      this.svg.classList.toggle("smooth", keep > 0);
      if (keep === 0) return;
      for (const line of this.lines) {
        const points = smoothed(line.means ?? line.points, keep);
        const d = points.map(([step, value], i) => `${i ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`);
        this.svg.append(make("path", { class: `line smoothed s${line.style}`, d: d.join("") }));
      }
    }
  }

  /* A response whose tokens have numbers: bars for one of them, all of them for the token that is read. */
  class Trace {
    constructor(article) {
      this.article = article;
      this.reader = article.querySelector(".reader");
      this.readout = article.querySelector(".readout");
      for (const event of ["input", "focus"]) this.reader.addEventListener(event, () => this.read(Number(this.reader.value)));
      this.reader.addEventListener("blur", () => this.clear());
      for (const event of ["pointerover", "pointerdown"]) {
        article.addEventListener(event, ({ target }) => {
          const index = this.spans.indexOf(target);
          if (index >= 0) this.read(index);
        });
      }
      article.querySelector(".tokens").addEventListener("pointerleave", () => this.clear());
      this.load();
    }

    /* Read what the page has, which may have changed. */
    load() {
      this.spans = [...this.article.querySelectorAll(".tokens span")];
      Object.assign(this, JSON.parse(this.article.querySelector("script").textContent));
      this.reader.max = this.spans.length - 1;
      this.reader.hidden = this.spans.length < 2;
      this.reader.setAttribute("aria-valuetext", this.said(Number(this.reader.value)));
    }

    said(index) {
      const known = this.quantities.filter(({ values }) => values[index] !== null);
      const numbers = known.map(({ name, values }) => `${name} ${shown(values[index])}`);
      return `token ${index + 1} "${this.tokens[index]}": ${numbers.join(", ")}`;
    }

    read(index) {
      this.clear();
      this.reader.value = index;
      this.reader.setAttribute("aria-valuetext", this.said(index));
      this.readout.textContent = this.said(index);
      this.spans[index].classList.add("read");
    }

    clear() {
      for (const span of this.spans) span.classList.remove("read");
      this.readout.textContent = "";
    }

    show(name) {
      const values = this.quantities.find((quantity) => quantity.name === name)?.values ?? [];
      const largest = Math.max(...values.map((value) => Math.abs(value ?? 0)), Number.MIN_VALUE);
      this.spans.forEach((span, index) => {
        const value = values[index] ?? 0;
        span.classList.toggle("up", value > 0);
        span.classList.toggle("down", value < 0);
        span.style.setProperty("--size", `${Math.round((Math.abs(value) / largest) * 100)}%`);
      });
    }
  }

  const curves = new Map(), traces = new Map();

  /* The share of the mean that smoothing keeps at each point; 0: no smoothing. */
  const kept = () => Number(document.getElementById("smoothing")?.value ?? 0);
  document.addEventListener("input", (event) => {
    if (event.target.id !== "smoothing") return;
    const keep = kept();
    event.target.parentElement.querySelector("output").textContent = keep ? keep.toFixed(2) : "none";
    for (const curve of curves.values()) curve.smooth(keep);
  });
  document.addEventListener("change", (event) => {
    if (event.target.id === "quantity") for (const trace of traces.values()) trace.show(event.target.value);
  });

  /* Offer the quantities that the traces have, and show the chosen one. */
  const offer = () => {
    const select = document.getElementById("quantity");
    if (!select || !traces.size) return;
    const names = new Set([...traces.values()].flatMap((trace) => trace.quantities.map(({ name }) => name)));
    for (const option of select.options) names.delete(option.value);
    select.append(...[...names].map((name) => new Option(name)));
    for (const trace of traces.values()) trace.show(select.value);
  };

  /* Take up the curves and traces that a part of the page has. */
  const adopt = (part) => {
    const take = (known, selector, kind) => {
      for (const element of part.parentElement.querySelectorAll(selector)) {
        if (!part.contains(element) || !element.querySelector("script")) continue;
        if (known.has(element)) known.get(element).load();
        else known.set(element, new kind(element));
      }
    };
    take(curves, "figure.curve", Curve);
    take(traces, "article.trace", Trace);
    offer();
    if (curves.size) for (const element of document.querySelectorAll(".control, .hint")) element.hidden = false;
  };
  adopt(document.body);

  /* A link into folded content unfolds it. */
  const unfold = () => {
    let target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch { /* no address of a part */ }
    if (!target) return;
    for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  if (location.hash) unfold();

  /* What scrolls sideways can be scrolled with the keyboard, and says what it is. */
  const reach = () => {
    for (const box of document.querySelectorAll(".wide")) {
      if (box.scrollWidth > box.clientWidth) {
        box.tabIndex = 0;
        box.setAttribute("role", "group");
        box.setAttribute("aria-label", box.dataset.label ?? box.querySelector("caption").textContent);
      } else {
        box.removeAttribute("tabindex");
        box.removeAttribute("role");
        box.removeAttribute("aria-label");
      }
    }
  };
  addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);
  reach();

  /* Let a function change what is inside a part of the page, which stays itself. Values that are read and smoothing stay. */
  const change = (part, alter) => {
    const before = [...curves].filter(([figure]) => part.contains(figure));
    for (const [, curve] of before) curve.smooth(0);
    alter();
    for (const [figure] of before) {
      if (!figure.isConnected || !figure.querySelector("script")) curves.delete(figure);
    }
    adopt(part);
    reach();
  };
  return { change };
})();
