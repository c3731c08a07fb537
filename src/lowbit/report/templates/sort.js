for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, index) => row.cells[index]?.dataset.key ?? row.cells[index]?.textContent ?? "";
  heads.forEach((head, index) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const missing = (value) => value === "" || value === "nan";
    rows.sort((a, b) => {
      const x = key(a, index), y = key(b, index);
      if (missing(x) || missing(y)) return missing(x) - missing(y); // what was not measured stays last
      const order = head.classList.contains("number") ? Number(x.replace("inf", "Infinity")) - Number(y.replace("inf", "Infinity")) : x.localeCompare(y, undefined, { numeric: true });
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
