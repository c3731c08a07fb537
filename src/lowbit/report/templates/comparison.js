document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const row of document.querySelectorAll("table.filtered tbody tr")) row.hidden = !row.dataset.name.toLowerCase().includes(wanted);
});
