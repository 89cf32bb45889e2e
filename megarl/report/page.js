"use strict";
(() => {
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
      Object.assign(this, JSON.parse(figure.querySelector("script").textContent));
      this.values = this.lines.map((line) => new Map(line.points));
      this.steps = [...new Set(this.lines.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
      this.keep = 0;
      this.name();
      this.reader.max = this.steps.length - 1;
      this.reader.value = this.steps.length - 1;
      this.reader.hidden = this.steps.length < 2;
      this.reader.setAttribute("aria-valuetext", this.said(this.steps.at(-1)));
      this.reader.addEventListener("input", () => this.show(Number(this.reader.value)));
      this.reader.addEventListener("focus", () => this.show(Number(this.reader.value)));
      this.reader.addEventListener("blur", () => this.clear());
      for (const event of ["pointermove", "pointerdown"]) {
        this.svg.addEventListener(event, (at) => this.show(this.nearest(at)));
      }
      this.svg.addEventListener("pointerleave", () => this.clear());
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
      let best = 0;
      this.steps.forEach((step, index) => {
        if (Math.abs(this.x(step) - x) < Math.abs(this.x(this.steps[best]) - x)) best = index;
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

  const curves = [...document.querySelectorAll("figure.curve")]
    .filter((figure) => figure.querySelector("script"))
    .map((figure) => new Curve(figure));

  const control = document.getElementById("smoothing");
  if (control && curves.length) {
    const output = control.parentElement.querySelector("output");
    control.addEventListener("input", () => {
      const keep = Number(control.value);
      output.textContent = keep ? keep.toFixed(2) : "none";
      for (const curve of curves) curve.smooth(keep);
    });
    for (const element of document.querySelectorAll(".control, .hint")) element.hidden = false;
  }

  /* A link into folded content unfolds it. */
  const unfold = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
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
})();
