"use strict";
// A film is a list of frames; with this script one is shown at a time, chosen with a slider.
for (const film of document.querySelectorAll(".film")) {
  const frames = [...film.querySelectorAll("li")];
  const slider = film.querySelector("input");
  const button = film.querySelector("button");
  const words = film.querySelector("output");
  let timer = 0;

  function show(index) {
    frames.forEach((frame, k) => { frame.hidden = k !== index; });
    const text = frames[index].dataset.words;
    slider.value = String(index);
    slider.setAttribute("aria-valuetext", text);
    words.textContent = text;
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  }

  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) { stop(); return; }
    let next = Number(slider.value) === frames.length - 1 ? 0 : Number(slider.value);
    button.textContent = "Pause";
    show(next);
    timer = setInterval(() => {
      next += 1;
      show(next);
      if (next === frames.length - 1) { stop(); }
    }, 350);
  });
  film.classList.add("live");
  film.querySelector(".controls").hidden = false;
  words.hidden = false;
  show(0);
}
