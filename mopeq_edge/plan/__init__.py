"""One type per decision group under a hard byte budget."""
