// Tables that are sorted by their headings, filtered, and shown a page at a time.
"use strict";
(() => {
  const PAGE = 25;

  function attach(root) {
    const table = root.querySelector("table");
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    const filters = [...root.querySelectorAll("select[data-column]")];
    const search = root.querySelector("input[type=search]");
    const status = root.querySelector("[role=status]");
    const [previous, next] = root.querySelectorAll(".pager button");
    // The page's rows are the table's; all others wait outside the document.
    const rows = [...body.rows].map((row) => ({
      row,
      text: row.textContent.toLowerCase(),
      values: [...row.cells].map((cell) => {
        const value = cell.dataset.value ?? cell.textContent.trim();
        return value !== "" && !Number.isNaN(Number(value)) ? Number(value) : value;
      }),
    }));
    let shown = rows;
    let page = 0;

    function fill() {
      const pages = Math.max(1, Math.ceil(shown.length / PAGE));
      page = Math.min(page, pages - 1);
      body.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map((entry) => entry.row));
      const first = shown.length ? page * PAGE + 1 : 0;
      const last = Math.min((page + 1) * PAGE, shown.length);
      status.textContent =
        `${first}–${last} of ${shown.length} rows` +
        (shown.length < rows.length ? ` (${rows.length} without filters)` : "");
      previous.disabled = page === 0;
      next.disabled = page === pages - 1;
    }

    function filter() {
      const words = search ? search.value.trim().toLowerCase() : "";
      shown = rows.filter(
        ({ text, values }) =>
          text.includes(words) &&
          filters.every((select) => select.value === "" || String(values[select.dataset.column]) === select.value),
      );
      page = 0;
      fill();
    }

    function sort(column) {
      const heading = headings[column];
      const descending = heading.ariaSort === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const sign = descending ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [a.values[column], b.values[column]];
        if (typeof x === "number" && typeof y === "number") return sign * (x - y);
        return sign * String(x).localeCompare(String(y), "en", { numeric: true });
      });
      filter();
    }

    headings.forEach((heading, column) => {
      heading.querySelector("button")?.addEventListener("click", () => sort(column));
    });
    filters.forEach((select) => select.addEventListener("change", filter));
    search?.addEventListener("input", filter);
    previous.addEventListener("click", () => { page -= 1; fill(); });
    next.addEventListener("click", () => { page += 1; fill(); });
    filter();
  }

  document.querySelectorAll("[data-table]").forEach(attach);
})();
