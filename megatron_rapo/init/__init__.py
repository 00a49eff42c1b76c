"""New projects: `reward/`, `method/` and `environment/` are copied as they stand (`project`)."""
