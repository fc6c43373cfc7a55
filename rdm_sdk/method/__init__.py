"""Pure tensor functions: every formula of the method, exactly once. No modules, no state, torch only."""
