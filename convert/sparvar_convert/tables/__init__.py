"""One rule table per model family."""
