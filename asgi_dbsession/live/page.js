"use strict";
const pause = document.getElementById("pause");
let source = null;
let spoken = 0;

// What is said aloud changes at most every ten seconds.
function say(text) {
  document.getElementById("summary").textContent = text;
  const status = document.getElementById("status");
  if (status.textContent !== text && Date.now() - spoken > 10000) {
    status.textContent = text;
    spoken = Date.now();
  }
}

function replace(part, html) {
  const scrolled = [...part.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  part.innerHTML = html;
  part.querySelectorAll(".scroll").forEach((each, number) => {
    each.scrollLeft = scrolled[number] ?? 0;
  });
}

function show(event) {
  const parts = JSON.parse(event.data);
  for (const [id, html] of Object.entries(parts.html)) {
    const part = document.getElementById(id);
    // Selected text and a focused table stay as they are.
    const selection = document.getSelection();
    const isSelected = selection.type === "Range" && part.contains(selection.anchorNode);
    if (!isSelected && !part.contains(document.activeElement)) replace(part, html);
  }
  say(parts.summary);
}

function start() {
  source = new EventSource("?events");
  source.onmessage = show;
  pause.textContent = "Pause";
  pause.setAttribute("aria-pressed", "false");
}

function stop() {
  source.close();
  source = null;
  pause.textContent = "Go on";
  pause.setAttribute("aria-pressed", "true");
}

pause.hidden = false;
pause.addEventListener("click", () => (source ? stop() : start()));
// A page that nobody sees asks for nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && source) { stop(); pause.dataset.hidden = "1"; }
  else if (!document.hidden && pause.dataset.hidden) { delete pause.dataset.hidden; start(); }
});
start();
