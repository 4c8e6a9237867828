"""What ``freqfusion predict`` reads and writes."""
