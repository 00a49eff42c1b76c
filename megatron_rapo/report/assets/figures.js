// What a figure's curves are at the pointer, or at the step that the arrow keys chose.
"use strict";
(() => {
  const number = (value) =>
    value === null ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

  function attach(figure) {
    const told = JSON.parse(figure.querySelector("script").textContent);
    const drawings = [...figure.querySelectorAll(".drawing")];
    const xs = [...new Set(told[0].lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    if (!xs.length) return;
    let chosen = -1;

    const along = (drawing, x) => {
      const [left, , right] = drawing.box;
      const scale = drawing.scale === "log2" ? Math.log2 : (value) => value;
      const [low, high] = drawing.xlim.map(scale);
      return left + ((scale(x) - low) / (high - low)) * (right - left);
    };

    function text(x) {
      const lines = told[0].lines.flatMap((line) => {
        const at = line.x.indexOf(x);
        if (at < 0 || line.y[at] === null) return [];
        const band = line.low.length ? ` [${number(line.low[at])}, ${number(line.high[at])}]` : "";
        return [{ colour: line.colour, label: line.label, value: number(line.y[at]) + band }];
      });
      return { head: `${told[0].x} ${number(x)}`, lines };
    }

    function show(index) {
      chosen = index;
      const { head, lines } = text(xs[index]);
      drawings.forEach((element, which) => {
        if (!element.offsetWidth) return;
        const drawing = told[which];
        const zoom = element.offsetWidth / element.querySelector("svg").viewBox.baseVal.width;
        const cursor = element.querySelector(".cursor");
        const tip = element.querySelector(".tip");
        const at = along(drawing, xs[index]) * zoom;
        cursor.hidden = tip.hidden = false;
        cursor.style.cssText = `left:${at}px;top:${drawing.box[1] * zoom}px;height:${(drawing.box[3] - drawing.box[1]) * zoom}px`;
        tip.replaceChildren();
        const title = document.createElement("b");
        title.textContent = head;
        tip.append(title);
        for (const line of lines) {
          const row = document.createElement("div");
          const dot = document.createElement("i");
          dot.style.background = `var(--${line.colour})`;
          row.append(dot, `${line.label}: ${line.value}`);
          tip.append(row);
        }
        const left = Math.min(at + 10, element.offsetWidth - tip.offsetWidth);
        tip.style.left = `${at + 10 + tip.offsetWidth > element.offsetWidth ? Math.max(0, at - 10 - tip.offsetWidth) : left}px`;
        tip.style.top = `${drawing.box[1] * zoom}px`;
      });
      figure.querySelector("[role=status]").textContent =
        document.activeElement && figure.contains(document.activeElement)
          ? `${head}: ${lines.map((line) => `${line.label} ${line.value}`).join(", ")}`
          : "";
    }

    function hide() {
      chosen = -1;
      for (const element of figure.querySelectorAll(".cursor, .tip")) element.hidden = true;
    }

    drawings.forEach((element, which) => {
      element.addEventListener("pointermove", (event) => {
        const box = element.getBoundingClientRect();
        const zoom = box.width / element.querySelector("svg").viewBox.baseVal.width;
        const at = (event.clientX - box.left) / zoom;
        let nearest = 0;
        xs.forEach((x, index) => {
          if (Math.abs(along(told[which], x) - at) < Math.abs(along(told[which], xs[nearest]) - at)) nearest = index;
        });
        show(nearest);
      });
      element.addEventListener("pointerleave", hide);
      element.addEventListener("blur", hide);
      element.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (!move) return;
        event.preventDefault();
        show(Math.min(xs.length - 1, Math.max(0, chosen < 0 && move < 0 ? xs.length - 1 : chosen + move)));
      });
    });
  }

  document.querySelectorAll("figure[data-told]").forEach(attach);
})();
