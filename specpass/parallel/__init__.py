"""Models whose weights are spread over processes: what one of them computes, and that all are told the same."""
