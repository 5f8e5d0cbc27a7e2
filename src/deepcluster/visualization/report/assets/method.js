"use strict";
// On a phone the steps are folded (method.css), so that the sections below them can be reached.
(() => {
  const steps = [...document.querySelectorAll(".method-step")];

  function fold(step, folded) {
    step.classList.toggle("folded", folded);
    step.querySelector(".fold").setAttribute("aria-expanded", String(!folded));
    if (!folded) deepcluster.fitFigures();
  }

  for (const [number, step] of steps.entries()) {
    const heading = step.querySelector("h3");
    const words = deepcluster.make("span", { class: "unseen" }, `step ${number + 1}`);
    heading.append(deepcluster.make("button", { type: "button", class: "fold" }, words));
    heading.addEventListener("click", () => fold(step, !step.classList.contains("folded")));
    fold(step, number > 0);
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#method-step']");
    if (link) fold(document.querySelector(link.hash), false);
  });
})();
