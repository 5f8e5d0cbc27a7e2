"use strict";
// What the sections' scripts share: blobs, elements, words, the theme, the menu, keys, and the page that reads itself again.
// Blobs are unpacked when they are first asked for, and once.
const deepcluster = (() => {
  const unpacked = new Map();
  const blob = (name) => document.getElementById(`blob-${name}`);

  function decode(base64) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
    const letters = atob(base64);
    const bytes = new Uint8Array(letters.length);
    for (let at = 0; at < bytes.length; at += 1) bytes[at] = letters.charCodeAt(at);
    return bytes;
  }

  async function unpack(name) {
    const element = blob(name);
    if (!element) throw new Error(`the page has no blob ${name}`);
    const packed = decode(element.textContent);
    if (element.dataset.mediaType) return packed.buffer;
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  function bytes(name) {
    if (!unpacked.has(name)) unpacked.set(name, unpack(name));
    return unpacked.get(name);
  }

  const has = (name) => blob(name) !== null;
  // A name may begin with a byte-order mark: it belongs to the name.
  const text = async (name) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(await bytes(name));
  const json = async (name) => JSON.parse(await text(name));

  // An element with attributes and children. Strings become text, never HTML: names of files are not to be trusted.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === undefined || value === null || value === false) continue;
      if (typeof value === "function") element.addEventListener(name, value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const number = (value) => value.toLocaleString("en");
  const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
  const distance = (value) => (Number.isFinite(value) ? value.toPrecision(3) : "unknown");
  function share(part) {
    const percent = 100 * part;
    if (percent > 0 && percent < 1) return "under 1 %";
    return percent > 99 && percent < 100 ? "over 99 %" : `${Math.round(percent)} %`;
  }

  // For those who hear the page.
  function say(words) {
    document.getElementById("said").textContent = words;
  }

  // What a browser may keep; one that keeps nothing for a file on disk throws.
  const kept = {
    read(store, key) {
      try { return window[store].getItem(key); } catch { return null; }
    },
    write(store, key, value) {
      try { window[store].setItem(key, value); } catch { /* then it is not kept */ }
    },
  };

  // Save a table as a file; the mark in front tells spreadsheets that it is UTF-8.
  function download(file, text) {
    const address = URL.createObjectURL(new Blob(["\ufeff", text], { type: "text/csv" }));
    make("a", { href: address, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }

  const oldBrowser = !("DecompressionStream" in window);
  document.getElementById("too-old").hidden = !oldBrowser;
  return { bytes, has, text, json, make, number, plural, distance, share, say, kept, download, oldBrowser };
})();

// The theme: the system's until the button is pressed.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  // Told apart in both themes: contrast of 3 and more against either paper (a test computes it).
  const colours = [
    "#4878cf", "#d1603d", "#3d9a5b", "#b04fb0", "#a67c1f", "#1f97a6",
    "#cf4868", "#7a68d6", "#6f8f2a", "#97705a", "#3f8ed0", "#c2578f",
  ];

  function set(theme) {
    root.dataset.theme = theme;
    for (const listener of listeners) listener(theme);
  }

  document.getElementById("theme").addEventListener("click", () => {
    set(root.dataset.theme === "dark" ? "light" : "dark");
    deepcluster.kept.write("localStorage", "deepcluster-theme", root.dataset.theme);
    deepcluster.say(`${root.dataset.theme} theme`);
  });
  dark.addEventListener("change", () => {
    if (!deepcluster.kept.read("localStorage", "deepcluster-theme")) set(dark.matches ? "dark" : "light");
  });

  // Paper is white: figures are drawn for it, too.
  let screen = root.dataset.theme;
  addEventListener("beforeprint", () => {
    screen = root.dataset.theme;
    set("light");
  });
  addEventListener("afterprint", () => set(screen));

  deepcluster.onTheme = (listener) => listeners.push(listener);
  deepcluster.colours = () => [...colours];
  deepcluster.colour = (index) => colours[index % colours.length];
})();

// The menu marks the section that is read.
(() => {
  const menu = document.querySelector("#top nav");
  const links = new Map([...menu.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  // Names that are cut off at the left fade, as those at the right do.
  menu.addEventListener("scroll", () => menu.classList.toggle("scrolled", menu.scrollLeft > 4), { passive: true });

  function mark(name) {
    for (const [section, link] of links) {
      if (section === name) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    const link = links.get(name);
    // Only the menu itself is moved, when it is wider than the screen.
    if (link) menu.scrollLeft = link.offsetLeft - menu.offsetLeft - (menu.clientWidth - link.offsetWidth) / 2;
  }

  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) if (entry.isIntersecting) mark(entry.target.id);
    },
    { rootMargin: "-25% 0px -70% 0px" },
  );
  for (const section of document.querySelectorAll("#sections > section")) observer.observe(section);
  deepcluster.markSection = mark;
})();

// Keys that work everywhere.
(() => {
  const dialog = document.getElementById("keys");
  const shortcuts = new Map([["?", () => dialog.showModal()]]);

  document.getElementById("keys-open").addEventListener("click", () => dialog.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || dialog.open) return;
    const typing = event.target.matches("input, select, textarea, [contenteditable]");
    const action = shortcuts.get(event.key);
    if (!action || (typing && event.key !== "Escape")) return;
    if (action(event) !== false) event.preventDefault();
  });

  // `action` returns false where the key means nothing at the moment.
  deepcluster.onKey = (key, action) => shortcuts.set(key, action);

  // Elements of the grid in the next line (step 1) or the one before (-1), and of these the nearest sideways.
  function beside(items, current, step) {
    const top = items[current].getBoundingClientRect();
    const there = items.filter((item) => (item.getBoundingClientRect().top - top.top) * step > top.height / 2);
    if (!there.length) return current;
    const line = step * Math.min(...there.map((item) => step * item.getBoundingClientRect().top));
    const off = (item) => Math.abs(item.getBoundingClientRect().left - top.left);
    const nearest = there
      .filter((item) => Math.abs(item.getBoundingClientRect().top - line) < 2)
      .reduce((best, item) => (off(item) < off(best) ? item : best));
    return items.indexOf(nearest);
  }

  function target(key, items, current) {
    const last = items.length - 1;
    const moves = {
      ArrowRight: () => Math.min(current + 1, last), ArrowLeft: () => Math.max(current - 1, 0),
      ArrowDown: () => beside(items, current, 1), ArrowUp: () => beside(items, current, -1),
      Home: () => 0, End: () => last,
    };
    return moves[key]?.();
  }

  // One stop of the tab key for all links of a grid; the arrows move over them.
  deepcluster.roving = (grid) => {
    const items = () => [...grid.querySelectorAll("a")];
    items().forEach((item, position) => { item.tabIndex = position ? -1 : 0; });
    grid.addEventListener("focusin", (event) => {
      if (event.target.matches("a")) for (const item of items()) item.tabIndex = item === event.target ? 0 : -1;
    });
    grid.addEventListener("keydown", (event) => {
      const all = items();
      const current = all.indexOf(document.activeElement);
      if (current < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      const next = target(event.key, all, current);
      if (next === undefined) return;
      event.preventDefault();
      all[next].focus();
    });
    return grid;
  };
})();

// During training the page reloads itself, and stays where it was.
(() => {
  const seconds = Number(document.body.dataset.refreshSeconds);
  const key = `deepcluster-place ${location.pathname}`;
  const keepers = new Map();
  const before = seconds > 0 ? JSON.parse(deepcluster.kept.read("sessionStorage", key) ?? "{}") : {};
  let paused = before.paused === true;

  // What `keep()` gives now is what `deepcluster.place(name)` gives after the page was read again.
  deepcluster.keep = (name, keep) => keepers.set(name, keep);
  deepcluster.place = (name) => before[name];
  deepcluster.keep("scroll", () => window.scrollY);
  deepcluster.keep("paused", () => paused);
  if (!(seconds > 0)) return;

  // Pictures that are drawn late push down what is below them: the place is held until they are there, or a hand moves it.
  function hold(top) {
    const drawn = new ResizeObserver(() => scrollTo({ top, behavior: "instant" }));
    drawn.observe(document.body);
    for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"]) {
      addEventListener(kind, () => drawn.disconnect(), { once: true, passive: true });
    }
    setTimeout(() => drawn.disconnect(), 2000);
  }

  const busy = () =>
    paused || document.hidden || document.querySelector("dialog[open]") !== null ||
    document.activeElement?.matches("input, select, textarea") === true;

  function refresh() {
    if (busy()) {
      setTimeout(refresh, 1000);
      return;
    }
    const place = Object.fromEntries([...keepers].map(([name, keep]) => [name, keep()]));
    deepcluster.kept.write("sessionStorage", key, JSON.stringify(place));
    // A browser that is asked for a section scrolls there late, past the place that was kept.
    if (!location.hash.includes("=")) history.replaceState(null, "", location.href.split("#")[0]);
    location.reload();
  }

  const pause = document.getElementById("live-pause");
  const show = () => { pause.textContent = paused ? "resume" : "pause"; };
  pause.addEventListener("click", () => {
    paused = !paused;
    show();
  });
  show();
  document.getElementById("live").hidden = false;
  document.getElementById("live-time").textContent = `live: refreshed at ${new Date().toLocaleTimeString()}`;
  history.scrollRestoration = "manual";
  // Once the cards are there, which the place depends on; until then it must not be kept again.
  const settle = () => {
    if (before.scroll !== undefined) hold(before.scroll);
    setTimeout(refresh, 1000 * seconds);
  };
  addEventListener("load", () => Promise.resolve(deepcluster.gallery).then(() => requestAnimationFrame(settle), settle));
})();
