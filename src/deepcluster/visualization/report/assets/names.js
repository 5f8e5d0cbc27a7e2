"use strict";
// Names of clusters: those of names.csv, and those given on the page, which only this browser keeps until they are saved.
(() => {
  if (!deepcluster.has("clusters") || deepcluster.oldBrowser) return;
  const { make, plural, kept } = deepcluster;
  const bar = document.getElementById("names-bar");
  const listeners = [];
  let given = {};
  let own = {};  // Changed here; an empty one takes the name away.
  let key = "";

  const name = (cluster) => own[cluster] ?? given[cluster] ?? "";

  // The name of a cluster, or its number.
  deepcluster.clusterName = (cluster) => name(cluster) || `cluster ${cluster}`;
  deepcluster.hasName = (cluster) => name(cluster) !== "";
  deepcluster.onNames = (listener) => listeners.push(listener);
  const plainLink = deepcluster.clusterLink;
  deepcluster.clusterLink = (cluster, words) => {
    const link = plainLink(cluster, words);
    put(link);
    return link;
  };
  // The number of a cluster, shown where it has a name.
  deepcluster.clusterNumber = (cluster) =>
    make("span", { class: "cluster-number", "data-cluster": cluster, hidden: !name(cluster) }, `cluster ${cluster}`);
  // Clusters whose names hold `words`.
  deepcluster.clustersNamed = (words) => {
    const sought = words.trim().toLowerCase();
    const all = Object.keys({ ...given, ...own }).map(Number);
    return all.filter((cluster) => name(cluster).toLowerCase().includes(sought)).sort((one, other) => one - other);
  };

  // The words of a link to a cluster: its name, or what the link said before.
  function put(link) {
    link.dataset.words ??= link.textContent;
    const known = name(link.dataset.cluster);
    const words = known || link.dataset.words;
    if (link.textContent !== words) link.replaceChildren(make("bdi", {}, words));
    if (known) link.title = `cluster ${link.dataset.cluster}`;
    else link.removeAttribute("title");
  }

  function refresh() {
    for (const link of document.querySelectorAll("[data-cluster][href], [data-cluster][data-words]")) put(link);
    for (const number of document.querySelectorAll(".cluster-number")) number.hidden = !name(number.dataset.cluster);
    for (const listener of listeners) listener();
    const changes = Object.keys(own).length;
    bar.hidden = changes === 0;
    bar.querySelector(".count").textContent =
      `${changes === 1 ? "One name is" : `${changes} names are`} kept by this browser only.`;
  }

  function rename(cluster, words) {
    const chosen = words.trim();
    if (chosen === name(cluster)) return;
    own[cluster] = chosen;
    if (chosen === (given[cluster] ?? "")) delete own[cluster];
    kept.write("localStorage", key, JSON.stringify(own));
    deepcluster.say(chosen ? `cluster ${cluster} is named ${chosen}` : `cluster ${cluster} has no name`);
    refresh();
  }

  // The heading becomes a field: Enter keeps what it says, Escape does not.
  function edit(cluster, heading) {
    if (heading.querySelector("input")) return;
    const before = [...heading.childNodes];
    const field = make("input", {
      type: "text", class: "name-field", placeholder: `Cluster ${cluster}`, autocomplete: "off",
      "aria-label": `Name of cluster ${cluster}`,
    });
    field.value = name(cluster);
    const unchanged = field.value;
    let open = true;
    const end = (keep) => {
      if (!open) return;
      open = false;
      const hadFocus = document.activeElement === field;
      heading.replaceChildren(...before);
      if (keep && field.value !== unchanged) rename(cluster, field.value);
      if (hadFocus) (heading.querySelector("a") ?? heading).focus({ preventScroll: true });
    };
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") end(true);
      else if (event.key === "Escape") end(false);
    });
    field.addEventListener("blur", () => end(true));
    heading.replaceChildren(field);
    field.focus();
    field.select();
  }

  // A pencil beside a heading that holds the name of a cluster; a double click on the heading does the same.
  deepcluster.renameButton = (cluster, heading) => {
    const pencil = make("span", { "aria-hidden": "true" }, "✎");
    const button = make("button", { type: "button", class: "rename", title: "Give this cluster a name" }, pencil,
      make("span", { class: "unseen" }, `Name cluster ${cluster}`));
    button.addEventListener("click", () => edit(cluster, heading));
    if (!heading.querySelector("a")) heading.addEventListener("dblclick", () => edit(cluster, heading));
    return button;
  };

  function asTable() {
    const quoted = (words) => (/[",\n\r]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words);
    const clusters = Object.keys({ ...given, ...own }).map(Number).filter(deepcluster.hasName);
    const lines = clusters.sort((one, other) => one - other).map((cluster) => `${cluster},${quoted(name(cluster))}`);
    return ["cluster,name", ...lines, ""].join("\n");
  }

  bar.querySelector(".save").addEventListener("click", () => {
    deepcluster.download("names.csv", asTable());
    deepcluster.say(`names.csv is saved: ${plural(asTable().split("\n").length - 2, "name")}`);
  });
  bar.querySelector(".discard").addEventListener("click", () => {
    own = {};
    kept.write("localStorage", key, "{}");
    refresh();
  });

  async function load() {
    const { names, signature } = await deepcluster.json("clusters");
    given = names ?? {};
    key = `deepcluster-names ${location.pathname} ${signature}`;
    own = JSON.parse(kept.read("localStorage", key) ?? "{}");
    for (const [cluster, words] of Object.entries(own)) if (words === (given[cluster] ?? "")) delete own[cluster];
    refresh();
  }
  // What shows names waits for them.
  deepcluster.names = load();
})();
