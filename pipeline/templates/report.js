"use strict";
for (const range of document.querySelectorAll(".slider input")) {
  const show = () => range.parentElement.style.setProperty("--at", range.value + "%");
  range.addEventListener("input", show);
  show();
}
addEventListener("load", () => {
  const broken = [...document.images].filter((image) => !image.complete || image.naturalWidth === 0);
  document.documentElement.dataset.images = document.images.length;
  document.documentElement.dataset.brokenImages = broken.length;
});
