"""Run folders to tables and pages, and the race that trains them."""
