"""One step: batch, forward, backward, optimizer, schedule, and the state carried to the next step."""
