"""What every training run has: state, log, schedule, the loop's common part."""
