"""Images with texts: contrastive models of both, captions and attributes; their data and their metrics."""
