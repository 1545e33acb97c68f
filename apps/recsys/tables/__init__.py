"""Tables with several labels: multi-task recommenders, their data and their test report."""
