"""Reports and pictures of results. ``document`` is the page; the other modules fill it, one for each kind of result."""
