"""Property tests of the integer rooms: layout, plan and degrees. No torch, no processes."""
