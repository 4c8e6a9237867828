"""Pictures, plots and the parts of HTML pages. Each module needs the extra ``train``."""
