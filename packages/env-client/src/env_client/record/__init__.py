"""What remains of a run: plots, tables, summaries. Nothing here runs inside a control loop."""
