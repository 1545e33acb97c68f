"""The test report of a recommender: gates, experts, tasks."""
