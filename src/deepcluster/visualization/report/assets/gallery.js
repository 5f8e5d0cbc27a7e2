"use strict";
// The gallery: cards of clusters, a page of them at a time, sorted; and the search by file name.
(() => {
  const host = document.getElementById("gallery");
  if (!host || !deepcluster.has("clusters") || deepcluster.oldBrowser) return;
  const { make, number, plural, share } = deepcluster;
  const CARDS = innerWidth < 600 ? 12 : 24;
  const MOST_HITS = 200;
  const KINDS = { nearest: "nearest", random: "random", farthest: "farthest", all: "all three" };
  const TIGHTNESS = "Mean distance of its images to its centre: the smaller, the more alike they are.";

  const sort = document.getElementById("gallery-sort");
  const search = document.getElementById("gallery-search");
  const pages = document.getElementById("gallery-pages");
  const hits = make("div", {
    id: "gallery-hits", class: "panel", role: "region", "aria-label": "Images found", hidden: true,
  });
  const printed = make("p", { class: "only-print" });
  host.before(printed);
  const state = { page: 0, show: "nearest", ...deepcluster.place("gallery") };
  let clusters = null;
  let rows = null;
  let order = [];
  let moved = false;
  for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"]) {
    addEventListener(kind, () => { moved = true; }, { once: true, passive: true });
  }

  // Share of the most frequent label, of a cluster's images.
  function purity(cluster) {
    if (clusters.purity) return clusters.purity[cluster] ?? -1;
    const [first] = clusters.labels?.[cluster] ?? [];
    return first && clusters.size[cluster] ? first[1] / clusters.size[cluster] : -1;
  }

  // The most frequent labels of a cluster, {name, colour, count}, and the others.
  function mix(cluster) {
    const parts = (clusters.labels?.[cluster] ?? []).map(([label, count]) => ({
      name: rows.about.labels[label] ?? `label ${label}`, colour: deepcluster.colour(label), count,
    }));
    const others = clusters.size[cluster] - parts.reduce((sum, part) => sum + part.count, 0);
    if (parts.length && others > 0) parts.push({ name: "others", colour: "var(--line)", count: others });
    return parts;
  }

  // The mix as a bar, which screen readers get as words.
  function mixBar(cluster) {
    const parts = mix(cluster);
    const size = clusters.size[cluster];
    const words = parts.map((part) => `${part.name} ${share(part.count / size)}`).join(", ");
    const bar = make("div", { class: "mix", role: "img", "aria-label": `labels: ${words}`, title: words });
    for (const part of parts) {
      const piece = bar.appendChild(make("span"));
      piece.style.flexGrow = part.count;
      piece.style.background = part.colour;
    }
    return bar;
  }

  function mixWords(cluster) {
    const [first] = mix(cluster);
    return make(
      "p", { class: "mix-words" },
      make("span", { class: "name" }, make("bdi", {}, first.name)),
      make("span", { class: "soft" }, share(first.count / clusters.size[cluster])),
    );
  }

  const kinds = (show) => (show === "all" ? ["nearest", "random", "farthest"] : [show]);

  function exemplars(cluster, show) {
    return kinds(show).map((kind) => {
      const some = clusters[kind][cluster].length ? clusters[kind][cluster] : clusters.random[cluster];
      const group = deepcluster.thumbnails(some, `${KINDS[kind]} images of cluster ${cluster}`);
      return show === "all" ? make("div", { class: "kind" }, make("span", { class: "soft" }, KINDS[kind]), group) : group;
    });
  }

  // A card: heading, size and tightness, labels, and thumbnails of a kind. Also of the nearest clusters in the cluster's view.
  function card(cluster, show = state.show, level = "h3") {
    const size = clusters.size[cluster];
    const element = make("div", { class: `card cluster show-${show}` });
    const link = deepcluster.clusterLink(cluster, `Cluster ${cluster}`);
    const heading = make(level, {}, link);
    const facts = make("p", { class: "facts" }, deepcluster.clusterNumber(cluster),
      make("span", {}, size ? plural(size, "image") : "no images"));
    const tightness = clusters.tightness[cluster];
    if (tightness !== null) {
      facts.append(make("span", { title: TIGHTNESS }, `mean distance ${deepcluster.distance(tightness)}`));
    }
    const pencil = level === "h3" ? deepcluster.renameButton(cluster, heading) : null;
    if (pencil) pencil.tabIndex = -1; // With the keyboard on the cluster's own page: one stop less for each card.
    element.append(make("div", { class: "card-head" }, heading, pencil, facts));
    if (size && clusters.labels?.[cluster]?.length) element.append(mixBar(cluster), mixWords(cluster));
    element.append(...(size ? exemplars(cluster, show) : []));
    return element;
  }

  const keys = {
    size: (cluster) => clusters.size[cluster],
    tightness: (cluster) => clusters.tightness[cluster],
    purity,
    number: (cluster) => cluster,
  };

  // Clusters in the chosen order; those of which it is not known come last.
  function sorted() {
    const [key, way] = sort.value.split("-");
    const values = clusters.size.map((_, cluster) => keys[key](cluster));
    const known = (cluster) => values[cluster] !== null && values[cluster] !== -1;
    const sign = way === "ascending" ? 1 : -1;
    const compare = (one, other) => sign * (values[one] - values[other]) || one - other;
    const all = clusters.size.map((_, cluster) => cluster);
    return [...all.filter(known).sort(compare), ...all.filter((cluster) => !known(cluster))];
  }

  const lastPage = () => Math.max(0, Math.ceil(order.length / CARDS) - 1);

  function draw() {
    state.page = Math.max(0, Math.min(state.page, lastPage()));
    const first = state.page * CARDS;
    host.replaceChildren(...order.slice(first, first + CARDS).map((cluster) => card(cluster)));
    const last = Math.min(first + CARDS, order.length);
    const shown = `${number(first + 1)} – ${number(last)} of ${plural(order.length, "cluster")}`;
    pages.querySelector(".count").textContent = shown;
    printed.textContent = last - first < order.length ? `Printed are ${shown}; the page in the browser has all.` : "";
    pages.querySelector(".previous").disabled = state.page === 0;
    pages.querySelector(".next").disabled = state.page === lastPage();
  }

  function turn(step) {
    state.page += step;
    draw();
    const bar = document.getElementById("gallery-controls").getBoundingClientRect();
    if (bar.top < 0) document.getElementById("gallery-controls").scrollIntoView();
  }

  function buildPages() {
    const jump = make("input", {
      id: "gallery-jump", type: "number", min: 0, max: clusters.size.length - 1, inputmode: "numeric", placeholder: "number",
    });
    const label = make("label", { for: "gallery-jump" }, "open cluster");
    const form = make("form", { class: "jump" }, label, jump, make("button", {}, "open"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (jump.value !== "") deepcluster.openCluster(Number(jump.value));
    });
    pages.replaceChildren(
      make("button", { type: "button", class: "previous", click: () => turn(-1), "aria-label": "Previous page" }, "←"),
      make("span", { class: "count", role: "status" }),
      make("button", { type: "button", class: "next", click: () => turn(1), "aria-label": "Next page" }, "→"),
      form,
    );
    // The same two buttons below the cards, where a reader of the page ends.
    const below = make("nav", { class: "pages", "aria-label": "More clusters" },
      make("button", { type: "button", click: () => turn(-1) }, "← previous page"),
      make("button", { type: "button", click: () => turn(1) }, "next page →"));
    below.hidden = lastPage() === 0;
    host.after(below);
  }

  function buildSwitch() {
    const group = make("fieldset", { class: "switch" }, make("legend", {}, "show"));
    for (const [kind, words] of Object.entries(KINDS)) {
      const input = make("input", { type: "radio", name: "show", value: kind, checked: kind === state.show });
      input.addEventListener("change", () => {
        state.show = kind;
        draw();
      });
      group.append(make("label", {}, input, make("span", {}, words)));
    }
    sort.form.append(group);
  }

  // A found image: thumbnail, name, cluster.
  function hit(row) {
    const cluster = rows.cluster[row];
    const name = make("a", { href: `#image=${row}`, class: "name" }, make("bdi", {}, rows.name(row)));
    const where = cluster < 0 ? make("span", { class: "soft" }, "no cluster")
      : deepcluster.clusterLink(cluster);
    return make("li", {}, deepcluster.thumbnail(row), name, where);
  }

  async function find() {
    const words = search.value;
    hits.hidden = !words.trim();
    if (hits.hidden) return;
    const found = await deepcluster.search(words, MOST_HITS, () => search.value === words);
    if (!found) return;
    const more = found.count > found.rows.length ? `; the first ${number(found.rows.length)} are shown` : "";
    const among = rows.count < rows.about.images ? ` among the ${number(rows.count)} that are listed here` : "";
    const told = make("p", { role: "status" }, `${plural(found.count, "image")} found${among}${more}`);
    const named = deepcluster.clustersNamed(words);
    const links = named.flatMap((cluster, place) => [place ? ", " : "", deepcluster.clusterLink(cluster)]);
    hits.dataset.words = words;
    hits.replaceChildren(...(named.length ? [make("p", {}, `${plural(named.length, "cluster")}: `, ...links)] : []), told,
      make("ol", {}, ...found.rows.map(hit)));
  }

  function buildSearch() {
    let waiting = 0;
    document.getElementById("gallery-controls").after(hits);
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(find, 150);
    });
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      search.value = "";
      find();
    });
    deepcluster.onKey("/", () => {
      deepcluster.closeDetail();
      search.focus({ preventScroll: true });
      search.form.scrollIntoView({ behavior: "instant" });
    });
    search.form.addEventListener("submit", (event) => {
      event.preventDefault();
      find();
    });
  }

  // What the views of one cluster and of one image are made with, too.
  async function load() {
    [clusters, rows] = await Promise.all([deepcluster.json("clusters"), deepcluster.rows(), deepcluster.names]);
    return { clusters, rows, card, mix, TIGHTNESS };
  }
  deepcluster.gallery = load();

  // The cards came after the browser had scrolled to where it was asked to.
  function settle() {
    const scroll = deepcluster.place("scroll");
    if (moved) return;
    if (scroll !== undefined) scrollTo({ top: scroll, behavior: "instant" });
    else if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
  }

  async function start() {
    await deepcluster.gallery;
    if (state.sort) sort.value = state.sort;
    order = sorted();
    sort.addEventListener("change", () => {
      order = sorted();
      state.page = 0;
      draw();
    });
    buildPages();
    buildSwitch();
    buildSearch();
    draw();
    host.removeAttribute("aria-busy");
    settle();
    search.value = state.words ?? "";
    if (search.value) find();
    deepcluster.keep("gallery", () => ({ ...state, sort: sort.value, words: search.value }));
  }
  start();
})();
