"""One AdamW step with penalty and recording: reference (read first), native C++, Triton."""
