"""The report of a run: one page that says whether it went well."""
