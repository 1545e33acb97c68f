"""What a test reports of pairs: retrieval, experts by modality."""
