"""Where a column is: a folder, an object store, a web server, behind one interface."""
