"""What models that write a text of a text share: a translator, and a model of several tasks."""
