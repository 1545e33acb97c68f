"""Text to text: summaries, answers, queries; several tasks in one model."""
