"""Stands in for the screen: keeps what a run tells of its progress."""


class Heard:
    """Both kinds of progress: of bytes, and of steps."""

    def __init__(self):
        self.notes, self.counts, self.advanced = [], [], 0

    def begin(self, total):
        """Nothing is drawn."""

    def advance(self, count):
        self.advanced += count

    def count(self, done, total):
        self.counts.append((done, total))

    def note(self, text):
        self.notes.append(text)

    def about(self, words):
        return [note for note in self.notes if words in note]
