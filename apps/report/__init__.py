"""Parts of the test reports of all apps: plots, tables and intervals."""
