"""What the test reports of all apps are made of: plots, tables and intervals."""
