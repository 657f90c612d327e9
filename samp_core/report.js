"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = window.matchMedia("(max-width: 640px)");
const config = { responsive: true, displaylogo: false, displayModeBar: false };

function draw(id) {
  const { data, layout, phone } = figures[id];
  const chosen = structuredClone(layout);
  if (narrow.matches) {
    for (const [key, value] of Object.entries(phone)) {
      chosen[key] = value && typeof value === "object" && !Array.isArray(value)
        ? { ...chosen[key], ...value } : value;
    }
  }
  return Plotly.react(id, structuredClone(data), chosen, config);
}

const all = () => Promise.all(Object.keys(figures).map(draw));
all().then(() => document.documentElement.setAttribute("data-drawn", "yes"));
narrow.addEventListener("change", all);

// One chart, two readings: each button names the figure, and what to restyle in it.
for (const button of document.querySelectorAll("button[data-figure]")) {
  button.addEventListener("click", () => {
    const id = button.dataset.figure;
    const view = figures[id].views[button.dataset.view];
    for (const other of button.parentElement.children) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    view.traces.forEach((change, place) => Plotly.restyle(id, change, [place]));
    Plotly.relayout(id, view.layout);
  });
}
