"""HTML pages and the pictures on them."""
