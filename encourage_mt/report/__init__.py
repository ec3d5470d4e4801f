"""Make tables, charts and the HTML report."""
