"use strict";
// Near-duplicates as a table.
(() => {
  const button = document.getElementById("duplicates-save");
  if (!button || deepcluster.oldBrowser) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    deepcluster.download("near-duplicates.csv", await deepcluster.text("duplicates"));
    deepcluster.say("near-duplicates.csv is saved");
  });
})();
