"""Small convolutions whose channels lie side by side."""
