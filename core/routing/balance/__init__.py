"""Balance losses: their formulas, terms and weights."""
