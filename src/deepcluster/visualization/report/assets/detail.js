"use strict";
// One cluster (#cluster=12) and one image (#image=345), in the place of the sections; and the way there and back.
(() => {
  const { make, number, plural, share } = deepcluster;
  const SHOWN = 100;
  const AROUND = 12;
  const sections = document.getElementById("sections");
  const detail = document.getElementById("detail");
  const title = document.title;
  // Where each address was left: scroll, page of images, and what had the focus.
  const places = new Map();
  let shown = "";
  let home = "";
  let step = () => false;
  let page = 0;

  const parse = (hash) => /^#(cluster|image)=(\d+)$/.exec(hash);

  // Links: back, and to the previous and the next.
  function bar(kind, previous, next) {
    const link = (to, words, label) =>
      to === null ? make("span", { class: "soft" }, words) : make("a", { href: `#${kind}=${to}`, "aria-label": label }, words);
    step = (way) => {
      const to = way < 0 ? previous : next;
      if (to === null) return false;
      open(`#${kind}=${to}`);
      return true;
    };
    return make(
      "nav", { class: "detail-bar", "aria-label": "Back and beside" },
      make("button", { type: "button", class: "back", click: close }, "← back"),
      make("span", { class: "beside" },
        link(previous, "‹ previous", `Previous ${kind}`), link(next, "next ›", `Next ${kind}`)),
    );
  }

  function heading(words) {
    return make("h2", { id: "detail-title", tabindex: -1 }, make("bdi", {}, words));
  }

  // The heading of a cluster: its name, which can be changed, or its number.
  function namedHeading(cluster) {
    const words = make("bdi", { "data-cluster": cluster, "data-words": `Cluster ${cluster}` },
      deepcluster.hasName(cluster) ? deepcluster.clusterName(cluster) : `Cluster ${cluster}`);
    const title = make("h2", { id: "detail-title", tabindex: -1 }, words);
    return make("div", { class: "named" }, title, deepcluster.renameButton(cluster, title));
  }

  function mixList(gallery, cluster) {
    const parts = gallery.mix(cluster);
    if (!parts.length) return null;
    const size = gallery.clusters.size[cluster];
    const line = (part) => {
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = part.colour;
      return make("li", {}, swatch, make("bdi", {}, part.name),
        make("span", { class: "soft" }, `${share(part.count / size)}, ${plural(part.count, "image")}`));
    };
    return make("ul", { class: "mix-list", "aria-label": "Labels" }, ...parts.map(line));
  }

  // How many images there are, how many of them here, and where all are.
  function truth({ clusters, rows }, cluster) {
    const [size, listed] = [clusters.size[cluster], clusters.listed[cluster]];
    const parts = [size ? plural(size, "image") : "No images: no image is nearest to its centre"];
    if (size && listed < size) {
      const all = rows.about.table ? `; all are in ${rows.about.table}` : "";
      parts.push(`${number(listed)} of them ${listed === 1 ? "is" : "are"} in this page${all}`);
    } else if (listed > 1) parts.push("nearest to the centre first");
    return `${parts.join(", ")}.`;
  }

  // All listed images of a cluster, a page at a time.
  function images({ clusters, rows }, cluster) {
    const [first, listed] = [clusters.first_row[cluster], clusters.listed[cluster]];
    const last = Math.max(0, Math.ceil(listed / SHOWN) - 1);
    const host = make("div", { class: "images" });
    const caption = (row) => [make("span", { class: "soft" }, deepcluster.distance(rows.distance[row]))];

    function turned(way) {
      page += way;
      draw(way);
    }

    function draw(focus) {
      page = Math.max(0, Math.min(page, last));
      const begin = page * SHOWN;
      const some = Array.from({ length: Math.min(SHOWN, listed - begin) }, (_, place) => first + begin + place);
      const grid = deepcluster.thumbnails(some, `images of cluster ${cluster}, with their distance to its centre`, caption);
      const turn = (way, words) =>
        make("button", { type: "button", disabled: page + way < 0 || page + way > last, click: () => turned(way) }, words);
      const back = turn(-1, "← nearer");
      const on = turn(1, "farther →");
      const words = `${number(begin + 1)} – ${number(begin + some.length)} of ${number(listed)}`;
      const count = make("span", { role: "status" }, words);
      host.replaceChildren(grid);
      if (last) host.append(make("nav", { class: "pages", "aria-label": "Pages of images" }, back, count, on));
      if (focus) (focus < 0 && !back.disabled ? back : on.disabled ? back : on).focus({ preventScroll: true });
    }
    draw();
    return host;
  }

  function nearestClusters(gallery, cluster) {
    const near = gallery.clusters.neighbours?.[cluster] ?? [];
    if (!near.length) return [];
    const cards = near.map((other) => gallery.card(other, "nearest", "h4"));
    return [make("h3", {}, "Nearest clusters"), make("div", { class: "grid" }, ...cards)];
  }

  // What became of it: where most of its images were in earlier epochs.
  function past({ clusters }, cluster) {
    const { epochs, cluster: groups, share: shares } = clusters.past ?? { epochs: [] };
    if (!epochs.length || !clusters.size[cluster]) return [];
    const line = epochs.map((epoch, column) => {
      const group = groups[cluster][column] ?? -1;
      const part = shares[cluster][column] ?? 0;
      const when = make("span", { class: "soft" }, `epoch ${epoch}`);
      if (group < 0) return make("li", {}, when, make("span", {}, "not in a cluster"));
      const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span"));
      bar.firstChild.style.width = `${100 * part}%`;
      // No link: the cluster of that number has other images today.
      const words = make("span", {}, `cluster ${group}`);
      return make("li", {}, when, words, make("span", {}, "held ", make("strong", {}, share(part))), bar);
    });
    return [
      make("h3", {}, "Where its images were before"),
      make("p", { class: "soft" }, "For each earlier epoch: the cluster that held most of these images, and the share of them that it held. A cluster keeps its number only as far as it keeps its images, so the number may change from epoch to epoch."),
      make("ol", { class: "past" }, ...line),
    ];
  }

  // To the map, where the cluster's dots stand out.
  function mapButton(cluster) {
    if (!deepcluster.has("map-rows")) return null;
    const go = () => {
      dispatchEvent(new CustomEvent("deepcluster:cluster", { detail: cluster }));
      location.hash = "#map";
      setTimeout(() => document.getElementById("map-plot").scrollIntoView({ behavior: "instant", block: "center" }), 100);
    };
    return make("p", { class: "actions" }, make("button", { type: "button", click: go }, "show on the map"));
  }

  function clusterView(gallery, cluster) {
    const { clusters } = gallery;
    const last = clusters.size.length - 1;
    if (cluster > last) return missing(`There is no cluster ${number(cluster)}: they are 0 to ${number(last)}.`);
    const tightness = clusters.tightness[cluster];
    const facts = tightness === null ? null
      : make("p", {}, `Mean distance of its images to its centre: ${deepcluster.distance(tightness)}. `,
        make("span", { class: "soft" }, "The smaller, the more alike they are."));
    return [
      bar("cluster", cluster > 0 ? cluster - 1 : null, cluster < last ? cluster + 1 : null),
      namedHeading(cluster),
      make("p", { class: "truth" }, deepcluster.clusterNumber(cluster), truth(gallery, cluster)), facts, mixList(gallery, cluster), mapButton(cluster),
      ...(clusters.listed[cluster] ? [make("h3", {}, "Images"), images(gallery, cluster)] : []),
      ...past(gallery, cluster),
      ...nearestClusters(gallery, cluster),
    ];
  }

  // First row of the image's cluster (of those in none: -1) and how many rows it has.
  function family({ clusters, rows }, row) {
    const cluster = rows.cluster[row];
    if (cluster >= 0) return [clusters.first_row[cluster], clusters.listed[cluster]];
    const first = clusters.listed.reduce((sum, listed) => sum + listed, 0);
    return [first, rows.count - first];
  }

  function copyButton(name, field) {
    const button = make("button", { type: "button" }, "copy");
    button.addEventListener("click", async () => {
      field.select();
      try {
        await navigator.clipboard.writeText(name);
        button.textContent = "copied";
      } catch {
        button.textContent = "selected: press Ctrl+C";
      }
      deepcluster.say(button.textContent);
    });
    return button;
  }

  function imageFacts(gallery, row) {
    const { clusters, rows } = gallery;
    const cluster = rows.cluster[row];
    const [first, count] = family(gallery, row);
    const facts = make("dl", { class: "image-facts" });
    const fact = (name, ...value) => facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...value)));
    if (cluster < 0) fact("cluster", "none");
    else {
      fact("cluster", deepcluster.clusterLink(cluster));
      fact("distance", deepcluster.distance(rows.distance[row]), make("span", { class: "soft" }, " to its centre"));
      const listed = count < clusters.size[cluster] ? " that are listed here" : "";
      fact("place", `${number(row - first + 1)} of ${number(count)}${listed}, `, make("span", { class: "soft" }, "nearest first"));
    }
    if (rows.label) fact("label", make("bdi", {}, rows.labelName(row) ?? "unknown"));
    return facts;
  }

  // The nearest of the images that were compared with each other.
  function similar(rows, row) {
    const { similar: near, about } = rows;
    const some = near ? Array.from(near.subarray(row * about.similar, (row + 1) * about.similar)).filter((other) => other >= 0) : [];
    if (!some.length) return [];
    return [make("h3", {}, "Most similar images"), deepcluster.thumbnails(some, "most similar images, the nearest first")];
  }

  // The whole picture where the page has it, else the thumbnail.
  function largePicture(row, name) {
    const address = deepcluster.whole(row);
    if (address === null) {
      const thumbnail = deepcluster.thumbnail(row);
      thumbnail.classList.add("large");
      return thumbnail;
    }
    const picture = make("img", { class: "whole", alt: name });
    address.then((there) => { picture.src = there; });
    return picture;
  }

  function imageView(gallery, row) {
    const { rows } = gallery;
    if (row >= rows.count) return missing(`There is no image ${number(row)} in this page.`);
    const name = rows.name(row);
    const [first, count] = family(gallery, row);
    const begin = Math.max(first, Math.min(row - AROUND, first + count - 2 * AROUND - 1));
    const length = Math.min(2 * AROUND + 1, count, first + count - begin);
    const around = Array.from({ length }, (_, place) => begin + place);
    const beside = deepcluster.thumbnails(around, "images beside it in its cluster");
    const current = beside.children[row - begin];
    current.setAttribute("aria-current", "true");
    const field = make("input", { id: "image-name", type: "text", readonly: true, value: name, dir: "auto" });
    const large = largePicture(row, name);
    return [
      bar("image", row > first ? row - 1 : null, row < first + count - 1 ? row + 1 : null),
      heading(name.split("/").at(-1)),
      make("div", { class: "image-view" }, large, make("div", {},
        make("label", { for: "image-name" }, "file"),
        make("div", { class: "copy" }, field, copyButton(name, field)), imageFacts(gallery, row))),
      ...similar(rows, row),
      make("h3", {}, rows.cluster[row] < 0 ? "Others in no cluster" : "Beside it in its cluster, by distance to the centre"), beside,
    ];
  }

  function missing(words) {
    step = () => false;
    return [bar("cluster", null, null), heading("Not here"), make("p", { class: "notice" }, words)];
  }

  function leave() {
    const focus = document.activeElement;
    places.set(shown, { home, scroll: scrollY, page, focus: focus === document.body ? null : focus });
  }

  function showSections(place) {
    detail.hidden = true;
    detail.replaceChildren();
    sections.hidden = false;
    document.title = title;
    deepcluster.fitFigures();
    // The browser could not scroll to a section that was hidden.
    if (!place) return document.getElementById(home.slice(1))?.scrollIntoView({ behavior: "instant" });
    place.focus?.focus({ preventScroll: true });
    return scrollTo({ top: place.scroll, behavior: "instant" });
  }

  async function showDetail([hash, kind, digits], place) {
    const gallery = await deepcluster.gallery;
    if (shown !== hash) return;
    page = place?.page ?? 0;
    const parts = (kind === "cluster" ? clusterView : imageView)(gallery, Number(digits));
    detail.replaceChildren(...parts.filter((part) => part !== null));
    sections.hidden = true;
    detail.hidden = false;
    deepcluster.markSection(document.getElementById("gallery").closest("section")?.id);
    const head = document.getElementById("detail-title");
    document.title = `${head.textContent} – ${title}`;
    head.focus({ preventScroll: true });
    scrollTo({ top: place?.scroll ?? 0, behavior: "instant" });
  }

  // Show what an address means; `place` is where it was left, if one goes back to it.
  function show(hash, place) {
    leave();
    const address = deepcluster.gallery && parse(hash);
    if (address) {
      shown = hash;
      return showDetail(address, place);
    }
    home = hash;
    if (shown) {
      shown = "";
      showSections(place?.home === home ? place : null);
    }
    return null;
  }

  // A new step, as by a link: from the top.
  function open(hash) {
    if (hash === shown) return;
    show(hash, null);
    location.hash = hash;
  }

  function close() {
    if (!shown) return false;
    const place = places.get("") ?? null;
    show(home, place);
    location.hash = home;
    if (place) scrollTo({ top: place.scroll, behavior: "instant" });
    return true;
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    if (parse(link.hash)) {
      event.preventDefault();
      open(link.hash);
    } else if (shown && link.hash !== "#content") {
      show(link.hash, null);
    }
  });
  // Back and forward, and addresses typed by hand.
  addEventListener("hashchange", () => {
    const { hash } = location;
    if (parse(hash) ? hash === shown : !shown) {
      if (!shown) home = hash;
      return;
    }
    show(hash, places.get(parse(hash) ? hash : "") ?? null);
  });

  deepcluster.openCluster = (cluster) => open(`#cluster=${cluster}`);
  deepcluster.openImage = (row) => open(`#image=${row}`);
  deepcluster.closeDetail = close;
  deepcluster.onKey("Escape", close);
  const beside = (way) => () => Boolean(shown) && step(way);
  deepcluster.onKey("n", beside(1));
  deepcluster.onKey("p", beside(-1));
  deepcluster.onKey("ArrowRight", beside(1));
  deepcluster.onKey("ArrowLeft", beside(-1));

  if (deepcluster.oldBrowser || !deepcluster.gallery) return;
  deepcluster.keep("images-page", () => page);
  const begin = parse(location.hash);
  if (begin) show(location.hash, { page: deepcluster.place("images-page") ?? 0, scroll: deepcluster.place("scroll") ?? 0 });
})();
