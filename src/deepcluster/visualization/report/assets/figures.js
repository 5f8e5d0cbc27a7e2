"use strict";
// Figures and thumbnails of the sections, drawn when they come into view; Plotly is unpacked for the first of them.
(() => {
  let plotly = null;
  const drawn = new Map();
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  async function load() {
    const program = document.createElement("script");
    program.textContent = await deepcluster.text("plotly");
    document.head.append(program);
    return window.Plotly;
  }

  // The colours of the theme for everything that a figure does not colour itself.
  function template() {
    const axis = {
      gridcolor: variable("--line"), linecolor: variable("--line"), zerolinecolor: variable("--line"), automargin: true,
    };
    const narrow = innerWidth < 600;
    return {
      layout: {
        title: { x: 0, xanchor: "left", xref: "paper", font: { size: 16 } },
        margin: { t: 56, r: 16, b: 48, l: 48 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: variable("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13 },
        colorway: deepcluster.colours(),
        xaxis: axis, yaxis: axis,
        hoverlabel: { bgcolor: variable("--panel"), bordercolor: variable("--line"), font: { color: variable("--ink") } },
        legend: { bgcolor: "rgba(0,0,0,0)", ...(narrow ? { orientation: "h", x: 0, y: -0.25, yanchor: "top" } : {}) },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--soft"), activecolor: variable("--accent") },
      },
    };
  }

  function draw(element, figure) {
    const layout = { uirevision: "kept", ...figure.layout, template: template(), autosize: true };
    delete layout.width;
    const config = {
      displaylogo: false, responsive: true, displayModeBar: innerWidth < 600 ? false : "hover",
      // These alone: the library's own bar offers to upload the chart.
      modeBarButtons: [["toImage", "resetScale2d"]], showSendToCloud: false, plotlyServerURL: "",
    };
    return window.Plotly.react(element, figure.data, layout, config);
  }

  // Draws a Plotly figure {data, layout} in an element and keeps it in the colours of the theme; gives a promise of the element.
  deepcluster.figure = async (element, figure) => {
    plotly ??= load();
    await plotly;
    await draw(element, figure);
    drawn.set(element, figure);
    element.classList.add("drawn");
    return element;
  };

  deepcluster.onTheme(() => {
    for (const [element, figure] of drawn) {
      if (element.isConnected) draw(element, figure);
      else drawn.delete(element);
    }
  });
  // A window that changed while the figures were hidden.
  deepcluster.fitFigures = () => {
    for (const element of drawn.keys()) if (element.offsetParent) window.Plotly.Plots.resize(element);
  };

  async function drawNamed(element) {
    const figure = (await deepcluster.json("figures"))[element.id];
    if (figure) await deepcluster.figure(element, figure);
  }

  function becomeThumbnail(element) {
    const row = Number(element.dataset.row);
    const inLink = element.closest("a") !== null;
    element.replaceWith(inLink ? deepcluster.thumbnail(row) : deepcluster.thumbnailLink(row));
  }

  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        if (target.matches(".figure")) drawNamed(target);
        else becomeThumbnail(target);
      }
    },
    { rootMargin: "200px" },
  );

  // Figures and thumbnails in an element become what they stand for when they come into view.
  deepcluster.hydrate = (root) => {
    for (const element of root.querySelectorAll(".figure[id], .thumb[data-row]")) seen.observe(element);
  };
  if (!deepcluster.oldBrowser) deepcluster.hydrate(document.getElementById("sections"));
})();
