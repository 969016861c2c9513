-- More reasons to be dead. A label can be used only once the transaction that added it is committed, so they come alone.
alter type clarion.dead_reason add value 'expired' after 'unprocessable';
alter type clarion.dead_reason add value 'total_timeout' after 'expired';
alter type clarion.dead_reason add value 'snoozes_exhausted' after 'total_timeout';
