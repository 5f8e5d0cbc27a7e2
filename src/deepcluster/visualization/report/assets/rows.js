"use strict";
// The listed images: names, clusters, distances, thumbnails, and the search by name.
(() => {
  const { make } = deepcluster;
  const SHARP = 128;
  let promised = null;
  let loaded = null;

  // Where each of the names, joined by NUL, begins; and where one after the last would.
  function beginnings(text, count) {
    const found = new Uint32Array(count + 1);
    for (let row = 1; row < count; row += 1) found[row] = text.indexOf("\0", found[row - 1]) + 1;
    found[count] = text.length + 1;
    return found;
  }

  // Names are cut out of a block's text when they are asked for: a million strings would be slow and large.
  class Names {
    constructor(text, count) {
      this.text = text;
      this.count = count;
    }

    at(position) {
      this.starts ??= beginnings(this.text, this.count);
      return this.text.slice(this.starts[position], this.starts[position + 1] - 1);
    }

    // Calls `found(position)` for each name that holds the (lower-case) words.
    each(words, found) {
      this.lower ??= plain(this.text);
      this.lowerStarts ??= beginnings(this.lower, this.count);
      let position = 0;
      for (let at = this.lower.indexOf(words); at >= 0; at = this.lower.indexOf(words, this.lowerStarts[position])) {
        position = this.holding(at, position);
        found(position);
        position += 1;
        if (position >= this.count) return;
      }
    }

    // The name that letter `at` belongs to, at or after name `low`.
    holding(at, low) {
      let high = this.count;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (this.lowerStarts[middle] <= at) low = middle;
        else high = middle;
      }
      return low;
    }
  }

  // One form for é, whether a name has it as one letter or as two.
  function plain(text) {
    const lower = text.toLowerCase();
    return /[^\0-\x7f]/.test(lower) ? lower.normalize("NFC") : lower;
  }

  async function namesOf(about) {
    const blocks = [];
    for (let block = 0; block < about.blocks; block += 1) {
      const count = Math.min(about.block, about.rows - block * about.block);
      blocks.push(new Names(await deepcluster.text(`names-${block}`), count));
    }
    return blocks;
  }

  async function load() {
    const about = await deepcluster.json("rows");
    const integers = async (name) => (deepcluster.has(name) ? new Int32Array(await deepcluster.bytes(name)) : null);
    const [cluster, label, thumbnail, similar, distances, blocks] = await Promise.all([
      integers("row-cluster"), integers("row-label"), integers("row-thumbnail"), integers("row-similar"),
      deepcluster.bytes("row-distance"), namesOf(about),
    ]);
    loaded = {
      about, count: about.rows, blocks, cluster, label, thumbnail, similar,
      distance: new Float32Array(distances),
      name: (row) => blocks[Math.floor(row / about.block)].at(row % about.block),
      labelName: (row) => (label && label[row] >= 0 ? about.labels[label[row]] : null),
    };
    return loaded;
  }

  deepcluster.rows = () => (promised ??= load());

  // Until the gallery knows the names of clusters (names.js).
  deepcluster.clusterName = (cluster) => `cluster ${cluster}`;
  deepcluster.clusterLink = (cluster, words = `cluster ${cluster}`) =>
    make("a", { "data-cluster": cluster, href: `#cluster=${cluster}` }, words);

  // Rows whose names hold `words`: how many there are, and the first of them. `goesOn()` false ends it: null.
  deepcluster.search = async (words, most, goesOn) => {
    const rows = await deepcluster.rows();
    const sought = plain(words.trim());
    const hits = { count: 0, rows: [] };
    for (const [number, block] of rows.blocks.entries()) {
      await new Promise((resume) => setTimeout(resume));
      if (!goesOn()) return null;
      block.each(sought, (position) => {
        hits.count += 1;
        if (hits.rows.length < most) hits.rows.push(number * rows.about.block + position);
      });
    }
    return hits;
  };

  // Sprite sheets: one object URL and one rule each, made when a first thumbnail of it is seen.
  const sheets = new Map();
  const style = document.head.appendChild(make("style"));

  async function openSheet(sheet) {
    const { a_sheet, across, count } = loaded.about.thumbnails;
    const down = Math.ceil(Math.min(a_sheet, count - sheet * a_sheet) / across); // The last sheet may be lower.
    const media = document.getElementById(`blob-sheet-${sheet}`).dataset.mediaType;
    const address = URL.createObjectURL(new Blob([await deepcluster.bytes(`sheet-${sheet}`)], { type: media }));
    style.sheet.insertRule(
      `.sheet-${sheet} { background-image: url("${address}"); background-size: ${100 * across}% ${100 * down}%; }`,
    );
    return down;
  }

  // The whole picture of a row, where the page has one: an address for an image.
  const wholes = new Map();
  deepcluster.whole = (row) => {
    if (!deepcluster.has(`whole-${row}`)) return null;
    const open = async () => {
      const media = document.getElementById(`blob-whole-${row}`).dataset.mediaType;
      return URL.createObjectURL(new Blob([await deepcluster.bytes(`whole-${row}`)], { type: media }));
    };
    if (!wholes.has(row)) wholes.set(row, open());
    return wholes.get(row);
  };

  async function paintWhole(element, row) {
    const address = await deepcluster.whole(row);
    element.style.background = `url("${address}") center / cover`;
    element.classList.add("seen");
  }

  async function paint(element, tile) {
    const { a_sheet, across } = loaded.about.thumbnails;
    const sheet = Math.floor(tile / a_sheet);
    if (!sheets.has(sheet)) sheets.set(sheet, openSheet(sheet));
    const down = await sheets.get(sheet);
    const place = tile % a_sheet;
    const part = (step, steps) => (steps > 1 ? (100 * step) / (steps - 1) : 0);
    element.style.backgroundPosition = `${part(place % across, across)}% ${part(Math.floor(place / across), down)}%`;
    element.classList.add(`sheet-${sheet}`, "seen");
  }

  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        if (target.dataset.whole) paintWhole(target, Number(target.dataset.whole));
        else paint(target, Number(target.dataset.tile));
      }
    },
    { rootMargin: "300px" },
  );

  function fill(element, row) {
    const name = loaded.name(row);
    const tile = loaded.thumbnail ? loaded.thumbnail[row] : -1;
    element.setAttribute("aria-label", name);
    element.title = name;
    // Small thumbnails would be blurred.
    const sharper = loaded.about.thumbnails.side < SHARP && deepcluster.has(`whole-${row}`);
    if (sharper) element.dataset.whole = row;
    if (tile >= 0 || sharper) {
      element.dataset.tile = tile;
      seen.observe(element);
    } else {
      element.classList.add("none");
      element.append(make("span", { "aria-hidden": "true" }, name.split("/").at(-1)));
    }
  }

  // The picture of a row; its sheet is unpacked when it comes into view.
  deepcluster.thumbnail = (row) => {
    const element = make("span", { class: "thumb", role: "img", "aria-label": `image ${row}` });
    if (loaded) fill(element, row);
    else deepcluster.rows().then(() => fill(element, row));
    return element;
  };

  // The same as a link to the image.
  deepcluster.thumbnailLink = (row, ...more) =>
    make("a", { class: "tile", href: `#image=${row}` }, deepcluster.thumbnail(row), ...more);

  // A group of thumbnails: one stop of the tab key, arrows move over them.
  deepcluster.thumbnails = (rows, label, more = () => []) => {
    const links = rows.map((row) => deepcluster.thumbnailLink(row, ...more(row)));
    return deepcluster.roving(make("div", { class: "thumbs", role: "group", "aria-label": label }, ...links));
  };
})();
