"""What the commands, the pages, `/metrics` and the HTTP API tell of the pipeline, each worked out in one place.

- `snapshot`: which parts run and what they report, asked in bounded time
- `attention`: what needs attention, as one list
- `journey`: one lead's story in order
- `search`: finding a lead
- `actions`: what an operator can change, and its wording
- `text`: numbers and times as people read them
"""
