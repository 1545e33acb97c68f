"""What a test reports of a recommender: gates, experts, tasks."""
