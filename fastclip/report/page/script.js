// While the pointer is over a chart, its caption shows the values of the nearest step.
for (const figure of document.querySelectorAll("figure[data-curves]")) {
  const svg = figure.querySelector("svg");
  const line = figure.querySelector(".pointer");
  const caption = figure.querySelector("figcaption");
  const before = caption.textContent;
  const curves = JSON.parse(figure.dataset.curves);
  const [left, right, width, last] = JSON.parse(figure.dataset.frame);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const wanted = ((x - left) / (right - left)) * last;
    let step = null;
    for (const [, points] of curves) {
      for (const [at] of points) {
        if (step === null || Math.abs(at - wanted) < Math.abs(step - wanted)) step = at;
      }
    }
    const values = curves.map(([name, points]) => [name, points.find(([at]) => at === step)]);
    caption.textContent =
      "step " + Math.round(step).toLocaleString("en") + ": " +
      values.filter(([, point]) => point).map(([name, point]) => name + " " + point[1]).join(", ");
    const place = left + (step / last) * (right - left);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.style.display = "inline";
  });
  svg.addEventListener("pointerleave", () => {
    caption.textContent = before;
    line.style.display = "none";
  });
}
