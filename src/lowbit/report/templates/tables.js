for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  const key = (row, index) => row.cells[index]?.dataset.key ?? row.cells[index]?.textContent ?? "";
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const missing = (value) => value === "" || value === "nan";
    rows.sort((a, b) => {
      const x = key(a, index), y = key(b, index);
      if (missing(x) || missing(y)) return missing(x) - missing(y); // what was not measured stays last
      const order = head.classList.contains("number") ? Number(x.replace("inf", "Infinity")) - Number(y.replace("inf", "Infinity")) : x.localeCompare(y, undefined, { numeric: true });
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));

  const filter = document.querySelector(`.filter[data-table="${table.id}"]`);
  if (!filter) continue;
  const input = filter.querySelector("input"), output = filter.querySelector("output");
  const texts = new Map(rows.map((row) => [row, `${row.cells[0].title} ${[...row.cells].map((cell) => cell.textContent).join(" ")}`.toLowerCase()]));
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => texts.get(row).includes(word));
    output.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  input.addEventListener("input", apply);
  filter.hidden = false;
  apply();
}
