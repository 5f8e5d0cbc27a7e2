"use strict";
// The map: a dot per image, by t-SNE or PCA. Dots are SVG, which every browser draws: 4,500 of them in 0.4 s (1 core, no GPU).
(() => {
  const host = document.getElementById("map-plot");
  if (!host || !deepcluster.has("map-rows") || deepcluster.oldBrowser) return;
  const { make, plural } = deepcluster;
  const controls = document.getElementById("map-controls");
  const choice = document.getElementById("map-highlight");
  const suggestions = document.getElementById("map-groups");
  const legend = document.getElementById("map-legend");
  const hover = document.getElementById("map-hover");
  const held = document.getElementById("map-held");
  // More groups than this have no legend.
  const MOST_NAMED = 24;
  // `highlight`: number of the group (cluster or label) that stands out, -1 = none; `at`: the dot that is held, -1 = none.
  const state = {
    layout: deepcluster.has("map-tsne") ? "tsne" : "pca", colour: "cluster", highlight: -1, at: -1, ...deepcluster.place("map"),
  };
  deepcluster.keep("map", () => state);
  let rows = null;
  let colourNumbers = [];
  let dots = null;
  let places = null;
  let figure = null;
  let stale = true;
  let visible = false;
  let drawing = null;

  async function load() {
    const floats = async (name) => (deepcluster.has(name) ? new Float32Array(await deepcluster.bytes(name)) : null);
    [rows, dots] = [await deepcluster.rows(), new Int32Array(await deepcluster.bytes("map-rows"))];
    await deepcluster.names;
    deepcluster.onNames?.(offerGroups);
    const clusters = deepcluster.has("clusters") ? await deepcluster.json("clusters") : {};
    if (clusters.neighbours?.length > deepcluster.colours().length) colourNumbers = apart(clusters);
    places = { tsne: await floats("map-tsne"), pca: await floats("map-pca") };
    if (state.at >= dots.length) state.at = -1;
    for (const name of ["layout", "colour"]) {
      const input = controls.querySelector(`input[name=${name}][value=${state[name]}]`);
      if (input) input.checked = true;
    }
    offerGroups();
  }

  const x = (dot) => places[state.layout][2 * dot];
  const y = (dot) => places[state.layout][2 * dot + 1];
  const groupOf = (dot) => (state.colour === "label" ? rows.label[dots[dot]] : rows.cluster[dots[dot]]);

  function groupName(group) {
    if (group < 0) return state.colour === "label" ? "no label" : "in no cluster";
    return state.colour === "label" ? rows.about.labels[group] : deepcluster.clusterName(group);
  }

  function groups() {
    const found = new Set(Array.from(dots.keys(), groupOf));
    return [...found].sort((one, other) => one - other);
  }

  function offerGroups() {
    const all = groups();
    suggestions.replaceChildren(...all.map((group) => make("option", { value: groupName(group) })));
    if (!all.includes(state.highlight)) state.highlight = -1;
    legend.hidden = all.length > MOST_NAMED;
    legend.replaceChildren(...(legend.hidden ? [] : all.map(legendEntry)));
    showChoice();
  }

  function legendEntry(group) {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = colourOf(group);
    const choose = () => highlight(state.highlight === group ? -1 : group);
    return make("li", {}, make("button", { type: "button", "data-group": group, click: choose }, swatch, groupName(group)));
  }

  function showChoice() {
    if (document.activeElement !== choice) choice.value = state.highlight < 0 ? "" : groupName(state.highlight);
    for (const button of legend.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.group) === state.highlight));
    }
  }

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colourOf = (group) => {
    if (group < 0) return "#8a8f98";
    return deepcluster.colour(state.colour === "cluster" ? (colourNumbers[group] ?? group) : group);
  };

  // Clusters that are near to each other get different colours: each the one that is rarest among its neighbours so far.
  function apart({ size, neighbours }) {
    const count = deepcluster.colours().length;
    const around = size.map(() => new Set());
    for (const [cluster, near] of neighbours.entries()) {
      for (const other of near) {
        around[cluster].add(other);
        around[other].add(cluster);
      }
    }
    const numbers = [];
    const used = new Array(count).fill(0);
    for (const cluster of size.keys()) {
      const taken = new Array(count).fill(0);
      for (const other of around[cluster]) if (numbers[other] !== undefined) taken[numbers[other]] += 1;
      const best = used.map((times, colour) => [taken[colour], times, colour]);
      best.sort((one, other) => one[0] - other[0] || one[1] - other[1] || one[2] - other[2]);
      numbers[cluster] = best[0][2];
      used[numbers[cluster]] += 1;
    }
    return numbers;
  }

  function trace(some, marker) {
    return {
      type: "scatter", mode: "markers", hoverinfo: "none", x: some.map(x), y: some.map(y), customdata: some,
      marker: { line: { width: 0 }, ...marker },
    };
  }

  // A ring around the dot that is held: a shape moves without drawing the dots again.
  function rings() {
    if (state.at < 0) return [];
    return [{
      type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: x(state.at), yanchor: y(state.at),
      x0: -9, x1: 9, y0: -9, y1: 9, line: { width: 2.5, color: variable("--ink") },
    }];
  }

  function compose() {
    const all = [...dots.keys()];
    const size = dots.length > 1500 ? 5 : 7;
    const chosen = state.highlight < 0 ? all : all.filter((dot) => groupOf(dot) === state.highlight);
    const rest = state.highlight < 0 ? [] : all.filter((dot) => groupOf(dot) !== state.highlight);
    const bright = state.highlight < 0
      ? { size, opacity: 0.8, color: chosen.map((dot) => colourOf(groupOf(dot))) }
      : { size: size + 3, opacity: 1, color: colourOf(state.highlight) };
    const axis = { visible: false, showgrid: false, zeroline: false };
    return {
      data: [trace(rest, { size, opacity: 0.22, color: "#8a8f98" }), trace(chosen, bright)],
      layout: {
        margin: { l: 8, r: 8, t: 8, b: 8 }, height: host.clientHeight, showlegend: false, hovermode: "closest",
        // A finger that moves scrolls the page: there the buttons zoom.
        hoverdistance: 12, dragmode: matchMedia("(hover: none)").matches ? false : "zoom",
        // The zoom is kept while the places are the same.
        uirevision: state.layout, xaxis: axis, yaxis: { ...axis, scaleanchor: state.layout === "pca" ? "x" : undefined },
        shapes: rings(),
      },
    };
  }

  async function draw() {
    stale = true;
    if (!visible) return;
    if (drawing) {
      await drawing;
      if (!stale) return;
    }
    stale = false;
    drawing = drawNow();
    await drawing;
    drawing = null;
  }

  async function drawNow() {
    if (!rows) await load();
    const first = figure === null;
    figure = compose();
    await deepcluster.figure(host, figure);
    if (first) listen();
    host.dataset.drawn = `${state.layout} ${state.colour} ${state.highlight}`;
    showHeld();
  }

  // Times nearer (or 0: all is seen), about the dot that is held, or the middle.
  function zoom(times) {
    if (!figure) return;
    const change = {};
    for (const [name, value] of [["xaxis", x], ["yaxis", y]]) {
      if (times === 0) {
        change[`${name}.autorange`] = true;
        continue;
      }
      const [low, high] = host._fullLayout[name].range;
      const middle = state.at < 0 ? (low + high) / 2 : value(state.at);
      const half = (high - low) / times / 2;
      change[`${name}.range`] = [middle - half, middle + half];
    }
    window.Plotly.relayout(host, change);
  }

  function moveRing() {
    figure.layout.shapes = rings();
    window.Plotly.relayout(host, { shapes: figure.layout.shapes });
  }

  function words(dot) {
    const row = dots[dot];
    const cluster = rows.cluster[row] < 0 ? "in no cluster" : deepcluster.clusterName(rows.cluster[row]);
    return { name: rows.name(row), facts: [cluster, rows.labelName(row)].filter(Boolean).join(" · ") };
  }

  function showHover(dot, pointer) {
    const { name, facts } = words(dot);
    hover.replaceChildren(
      deepcluster.thumbnail(dots[dot]), make("span", { class: "file" }, make("bdi", {}, name)), make("span", { class: "soft" }, facts),
    );
    hover.hidden = false;
    const frame = host.getBoundingClientRect();
    const [left, top] = [pointer.clientX - frame.left, pointer.clientY - frame.top];
    const right = left + hover.offsetWidth + 24 < frame.width;
    hover.style.left = `${Math.max(0, right ? left + 16 : left - hover.offsetWidth - 16)}px`;
    hover.style.top = `${Math.max(0, Math.min(top - 20, frame.height - hover.offsetHeight))}px`;
  }

  function showHeld() {
    held.hidden = state.at < 0;
    if (held.dataset.dot === String(state.at)) return;
    held.dataset.dot = state.at;
    if (held.hidden) {
      held.replaceChildren();
      return;
    }
    const row = dots[state.at];
    const { name } = words(state.at);
    const cluster = rows.cluster[row];
    const links = make("p", {}, make("a", { href: `#image=${row}` }, "open the image"));
    if (cluster >= 0) {
      links.append(" · open ", deepcluster.clusterLink(cluster));
    }
    const label = rows.labelName(row);
    held.replaceChildren(
      deepcluster.thumbnailLink(row),
      make("div", {}, make("p", { class: "file" }, make("bdi", {}, name)), label ? make("p", { class: "soft" }, label) : null, links),
    );
  }

  function hold(dot) {
    state.at = dot;
    moveRing();
    showHeld();
    if (dot < 0) return;
    const { name, facts } = words(dot);
    deepcluster.say(`${name}, ${facts}`);
  }

  function highlight(group) {
    state.highlight = group;
    if (rows) showChoice();
    if (group >= 0 && rows) {
      const count = dots.reduce((sum, _, dot) => sum + (groupOf(dot) === group), 0);
      deepcluster.say(`${groupName(group)}: ${plural(count, "dot")}`);
    }
    return draw();
  }

  // The nearest dot in a direction, within 45° of it, on the screen; from nowhere the one nearest to the middle.
  function next(stepX, stepY) {
    const { xaxis, yaxis } = host._fullLayout;
    const at = (dot) => [xaxis.d2p(x(dot)), yaxis.d2p(y(dot))];
    const [fromX, fromY] = state.at < 0 ? [xaxis._length / 2, yaxis._length / 2] : at(state.at);
    let [best, least] = [state.at, Infinity];
    for (const dot of dots.keys()) {
      const [toX, toY] = at(dot);
      const [byX, byY] = [toX - fromX, toY - fromY];
      const along = byX * stepX + byY * stepY;
      const across = Math.abs(byX * stepY) + Math.abs(byY * stepX);
      const cost = state.at < 0 ? Math.hypot(byX, byY) : along + across;
      if (cost < least && (state.at < 0 || (along > 0.01 && across <= along))) [best, least] = [dot, cost];
    }
    return best;
  }

  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  const zooms = { "+": 2, "=": 2, "-": 0.5, 0: 0 };

  function onKey(event) {
    if (!figure || event.ctrlKey || event.metaKey || event.altKey) return;
    const cluster = state.at < 0 ? -1 : rows.cluster[dots[state.at]];
    if (event.key in steps) hold(next(...steps[event.key]));
    else if (event.key in zooms) zoom(zooms[event.key]);
    else if (event.key === "Enter" && state.at >= 0) deepcluster.openImage(dots[state.at]);
    else if (event.key === "c" && cluster >= 0) deepcluster.openCluster(cluster);
    else if (event.key === "Escape" && (state.at >= 0 || state.highlight >= 0)) letGo();
    else return;
    event.preventDefault();
  }

  function letGo() {
    hold(-1);
    if (state.highlight >= 0) highlight(-1);
  }

  function listen() {
    host.on("plotly_hover", ({ points, event }) => showHover(points[0].customdata, event));
    host.on("plotly_unhover", () => { hover.hidden = true; });
    host.on("plotly_click", ({ points }) => hold(points[0].customdata));
  }

  host.addEventListener("keydown", onKey);
  for (const button of controls.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
  }
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("change", ({ target }) => {
    if (target === choice) return;
    state[target.name] = target.value;
    if (target.name === "colour") {
      state.highlight = -1;
      if (rows) offerGroups();
    }
    draw();
  });
  // The group of this name or number, or the only one whose name holds the words; -1 for none.
  function chosen() {
    const words = choice.value.trim().toLowerCase();
    if (!rows || !words) return -1;
    const all = groups();
    const named = all.find((group) => groupName(group).toLowerCase() === words);
    if (named !== undefined) return named;
    if (state.colour === "cluster" && /^\d+$/.test(words)) return all.includes(Number(words)) ? Number(words) : -1;
    const holding = all.filter((group) => groupName(group).toLowerCase().includes(words));
    return holding.length === 1 ? holding[0] : -1;
  }
  choice.addEventListener("input", () => {
    const group = chosen();
    if (group !== state.highlight) highlight(group);
  });

  // The ring and the greys are the theme's.
  deepcluster.onTheme(() => { if (figure) draw(); });

  // A cluster's dots stand out; from the gallery.
  deepcluster.highlight = (cluster) => {
    if (state.colour !== "cluster") {
      state.colour = "cluster";
      controls.querySelector("input[name=colour][value=cluster]").checked = true;
      if (rows) offerGroups();
    }
    return highlight(cluster);
  };
  addEventListener("deepcluster:cluster", ({ detail }) => deepcluster.highlight(detail));

  new IntersectionObserver(
    (entries) => {
      visible = entries.at(-1).isIntersecting;
      if (visible && stale) draw();
    },
    { rootMargin: "300px" },
  ).observe(host);
})();
