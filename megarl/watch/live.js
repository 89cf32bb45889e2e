"use strict";
/* Follows a run: on an event of the server, the parts of the page that have changed and can be seen are fetched. */
(() => {
  const PAUSE_MS = 500, ANNOUNCE_MS = 5000, RETRY_MS = 3000, MOST_PARTS = 200;
  const line = document.getElementById("live"), announced = document.getElementById("announced");
  const stateOf = (page) => JSON.parse(page.getElementById("state").textContent);
  let state = stateOf(document);
  let shown = { ...state.parts };  /* the version of each part that the page has */
  let connected = false, refused = false, changedAt = "";

  /* --- what is said of the run -------------------------------------------------------------------------------- */

  const tell = () => {
    line.className = `live${connected ? (state.running && !state.problem ? " running" : "") : " lost"}`;
    const last = state.said.endsWith(".") ? state.said : `Last: ${state.said}${changedAt && `, at ${changedAt}`}.`;
    const said = connected ? state.problem || (state.running ? "" : "The run has ended; if it is resumed, this page follows it.")
      : refused ? "megarl watch was started again: open the address that it printed."
        : "No connection to megarl watch. Trying again.";
    line.textContent = `${said} ${last}`.trim();
    announce(said || state.said);
  };

  const take = (fresh) => {
    if (fresh.said !== state.said) changedAt = new Date().toLocaleTimeString();
    state = fresh;
    tell();
  };

  /* A screen reader hears of new phases when it is silent, and of fast ones every few seconds. */
  let waiting = null, toSay = "";
  const announce = (text) => {
    toSay = text;
    if (waiting) return;
    const speak = () => { if (announced.textContent !== toSay) announced.textContent = toSay; };
    speak();
    waiting = setTimeout(() => { waiting = null; speak(); }, ANNOUNCE_MS);
  };

  /* --- changing the page -------------------------------------------------------------------------------------- */

  const SCRIPTED = new Set(["open", "hidden"]);  /* attributes that the reader or a script sets */
  const isElement = (node) => node.nodeType === Node.ELEMENT_NODE;
  const alike = (node, fresh) => node.nodeName === fresh.nodeName && (!isElement(node) || node.id === fresh.id);

  /* Make an element like a fresh one. Elements that stay keep focus, scroll position, and what is open or typed. */
  const become = (element, fresh) => {
    if (!isElement(element)) {
      if (element.data !== fresh.data) element.data = fresh.data;
      return;
    }
    if (["INPUT", "OUTPUT", "SELECT"].includes(element.nodeName)) return;
    for (const { name, value } of fresh.attributes) {
      if (!SCRIPTED.has(name) && element.getAttribute(name) !== value) element.setAttribute(name, value);
    }
    for (const { name } of [...element.attributes]) {
      if (!SCRIPTED.has(name) && !fresh.hasAttribute(name)) element.removeAttribute(name);
    }
    const named = new Map([...element.children].filter((child) => child.id).map((child) => [child.id, child]));
    let at = element.firstChild;
    for (const child of [...fresh.childNodes]) {
      const kept = child.id ? named.get(child.id) : at;
      if (kept && alike(kept, child)) {
        if (kept === at) at = at.nextSibling;
        else element.insertBefore(kept, at);
        become(kept, child);
      } else {
        element.insertBefore(child, at);
      }
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  };

  const parsed = (html) => new DOMParser().parseFromString(html, "text/html");
  const put = (element, fresh) => report.change(element, () => become(element, fresh));

  const visible = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) visible[isIntersecting ? "add" : "delete"](target.id);
    schedule();
  }, { rootMargin: "300px" });
  const observe = () => {
    for (const name of Object.keys(shown)) {
      const part = document.getElementById(name);
      if (part) observer.observe(part);
    }
  };

  const fetched = async (address) => {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
    return answer;
  };

  /* The whole page is taken where a part has come or gone. */
  const updateAll = async () => {
    const before = state;
    const fresh = parsed(await (await fetched("./")).text());
    for (const selector of ["#head", "nav", "main"]) put(document.querySelector(selector), fresh.querySelector(selector));
    document.title = fresh.title;
    shown = { ...stateOf(fresh).parts };
    if (state === before) take(stateOf(fresh));  /* an event that came meanwhile may be newer */
    observe();
  };

  const update = async () => {
    const parts = state.parts;
    const missing = (name) => !document.getElementById(name);
    const wanted = Object.keys(parts).filter((name) => parts[name] !== shown[name] && (visible.has(name) || missing(name)));
    if (wanted.length > MOST_PARTS || Object.keys(shown).some((name) => !(name in parts))) return updateAll();
    if (!wanted.length) return undefined;
    const answer = await (await fetched(`parts?${new URLSearchParams(wanted.map((name) => ["id", name]))}`)).json();
    if (Object.entries(answer).some(([name, [, html]]) => missing(name) === Boolean(html))) return updateAll();
    for (const [name, [version, html]] of Object.entries(answer)) {
      if (html) put(document.getElementById(name), parsed(html).body.firstElementChild);
      shown[name] = version;
    }
    return undefined;
  };

  /* One update at a time, then a pause. What changes meanwhile is taken by the next one. */
  let busy = false, again = false;
  const schedule = async () => {
    again = true;
    if (busy) return;
    busy = true;
    while (again) {
      again = false;
      try { await update(); } catch { /* the server is gone: the next event brings everything */ }
      await new Promise((resume) => setTimeout(resume, PAUSE_MS));
    }
    busy = false;
  };

  /* --- the connection: none while nobody looks ---------------------------------------------------------------- */

  /* Another watcher listens on the port: it does not take this page's cookie until its own address is opened. */
  const isRefused = () => fetch("parts", { method: "HEAD" }).then(({ status }) => status === 403, () => false);

  let source = null;
  const connect = () => {
    source?.close();
    source = new EventSource("events");
    const mine = source;
    source.onmessage = ({ data }) => {
      if (mine !== source) return;
      connected = true;
      refused = false;
      take(JSON.parse(data));
      schedule();
    };
    source.onerror = async () => {
      if (mine !== source) return;
      connected = false;
      if (mine.readyState === EventSource.CLOSED) refused = await isRefused();
      if (mine !== source) return;
      tell();
      if (mine.readyState === EventSource.CLOSED) setTimeout(() => mine === source && connect(), RETRY_MS);
    };
  };
  const attend = () => {
    if (!document.hidden) connect();
    else { source?.close(); source = null; }
  };
  document.addEventListener("visibilitychange", attend);
  addEventListener("pageshow", ({ persisted }) => persisted && attend());
  line.textContent = "Connecting to megarl watch.";
  observe();
  attend();
})();
