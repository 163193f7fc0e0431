"""What an answer is: slanted, neutral, deflecting, wrong, broken or unclear; by rules, or by a language model."""
